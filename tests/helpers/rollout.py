"""Questions for the model from scratch, and the logits of completions under a model."""

from reference.training.rollout.packing import pack_completions

QUESTIONS = ["7=", "123456=", "90+12="]
END = 1  # the token that ends a completion


def completion_logits(model, prompts, tokens, mask):
    """Return the logits [B·G, T, V] that predict each token of the completions."""
    packed = pack_completions(model, prompts, tokens, mask)
    return packed.select_predictions(model(**packed.model_inputs()).logits)
