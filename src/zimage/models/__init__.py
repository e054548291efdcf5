"""What computes with weights: text encoder, transformer, autoencoder, and the precision they run in."""
