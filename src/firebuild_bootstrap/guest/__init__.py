"""`vminit`, the program inside the machine: fetches the commands of a build and executes them."""
