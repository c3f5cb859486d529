"""How flat is the loss around a point, by which measure, and what does the measure mean?"""
