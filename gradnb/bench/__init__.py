"How fast it is beside others, on your machine."
