"""What a layer needs around the delta rule: projection, prefill, decoding, correction and segment means."""
