"""The benchmark suite behind `bench.py`: what is measured, against whom, and how."""
