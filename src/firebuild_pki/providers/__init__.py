"""The providers that come with firebuild: ordinary plugins, loaded only when selected."""
