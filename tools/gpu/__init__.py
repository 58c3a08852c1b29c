"""What `bench_gpu.py` measures, and the file that it keeps the figures in."""
