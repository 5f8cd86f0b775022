"""What is removed by its age."""
