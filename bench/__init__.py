"""Benchmarks: a demo to look at, pytest-benchmark suites to record, and the tables of the documents made from them."""
