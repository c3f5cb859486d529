"How parameters move: gradient estimators, rules, steppers, flows, and rules as torch optimizers."
