"""Each file holds one algorithm, which updates a batch of weights from momenta and a spectral cache."""
