"""A crash-safe store of encoded samples: immutable segments, a journal, sealed snapshots. Knows no model, no torch."""
