"The words that all others use: where randomness comes from, how sure a number is, what a name means, who does what."
