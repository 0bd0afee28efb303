"""One algorithm a file: a batch of weights, momenta and its spectral cache in, updated weights out."""
