"""What the scripts share: data, optimizer, checkpoints, several processes, faster decoding, scoring."""
