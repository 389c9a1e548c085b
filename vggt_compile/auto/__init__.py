"""Plans from measurements: what each layer of a model can spare on a user's own images, and the choice that follows."""
