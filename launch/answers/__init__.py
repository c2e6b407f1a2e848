"""What a model answers: one prompt, a conversation, two models beside each other, samples for the report."""
