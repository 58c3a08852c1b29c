"""What turns architectures into networks: pure functions, families, weight names."""
