"""What people look at: a page in Dask's dashboard, its numbers as JSON, and Prometheus metrics."""
