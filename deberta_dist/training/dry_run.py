def describe(plan): return "todo\n"
