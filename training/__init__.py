"""Training, comparison and measurement of video models; import it as ``nlkernels.training``."""

if __name__ != "nlkernels.training":
    raise ImportError(f"import this package as 'nlkernels.training', not as {__name__!r}")
