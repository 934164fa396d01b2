"""A drafter at work: decoding, acceptance, and the comparison with plain decoding."""
