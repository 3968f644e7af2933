"""A Flower app that does nothing but import what a fine-tuning client needs: the floor without a worker."""
