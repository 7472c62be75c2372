"""What training did, and which loss fits: evaluate, anchor, compare and report."""
