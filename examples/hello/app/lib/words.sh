subject() { echo "microVM"; }
