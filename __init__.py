"""Train convolutional networks on whole, huge images."""
