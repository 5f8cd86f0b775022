"""What services are given, taken from the deployment's settings: the same for CLI and Dagster."""
