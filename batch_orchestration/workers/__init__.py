"""Run workers: heartbeats, the watch over them, progress and utilization."""
