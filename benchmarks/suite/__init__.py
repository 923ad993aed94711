"""The benchmark suite behind `bench.py`.

A group (`groups/`) yields contests. In a contest (`contest`), several contenders do the same work
(`work`), with this package or with another one (`peers`). `timing` times them in turn, `accounting`
counts what they use, and `report` writes the results.
"""
