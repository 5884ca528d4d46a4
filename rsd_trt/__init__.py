"""rsd-trt: deploy Residual Speculative Decoding robot policies, and prove that the deployment is right."""

__version__ = "0.1.0"
