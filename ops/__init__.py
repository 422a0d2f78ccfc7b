"""What an operation means: checks, launch, registration, autograd, modules and references."""
