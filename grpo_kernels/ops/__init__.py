"""torch.library operators with their fakes and autograd formulas."""
