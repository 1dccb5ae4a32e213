"""The delta rule: over sequences, forward and backward, serially or in parallel chunks, and for a decoding step."""
