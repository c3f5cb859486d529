"What one sees of it: plots, claims, figures, explorers."
