"A training in a loop that is not ours."
