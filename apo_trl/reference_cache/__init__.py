"""`precompute_ref_log_probs`: the reference's log-probs, computed once per pair and never stale."""
