"""The parts of a policy as plain PyTorch modules: the slow, readable twin of everything that is optimised."""
