"""Steps of the algorithms on batches of weights, and the elementwise updates that they start from."""
