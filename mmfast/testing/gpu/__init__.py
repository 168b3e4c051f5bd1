"""What `benchmarks/gpu_suite.py` runs on a GPU: checks, cases at GPU sizes with GPU peers, and their clock."""
