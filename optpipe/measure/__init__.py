"""Measuring: latency in isolated, paired workers; quality with intervals."""
