"""A qemb model with the methods of SentenceTransformer, for libraries that take such an object:

    model = QembTransformer("model.qemb")
    SemHash.from_records(texts, model=model)
    InformationRetrievalEvaluator(queries, corpus, relevant)(model)
"""
from types import SimpleNamespace

import qemb


def unit(x):
    """x (..., dim), an array or tensor, scaled to length 1"""
    return x / (x * x).sum(-1)[..., None] ** 0.5


class QembTransformer:
    similarity_fn_name = "cosine"
    # where evaluators would leave their figures
    model_card_data = SimpleNamespace(set_evaluation_metrics=lambda *_: None)

    def __init__(self, path, truncate_dim=None, **options):
        """options: those of qemb.Model; longer texts are cut, as SentenceTransformer does."""
        self.model = qemb.Model(path, **{"truncate": True, **options})
        self.truncate_dim = truncate_dim
        self.prompts = self.model.prompts
        self.max_seq_length = self.model.max_tokens

    def encode(self, sentences, prompt_name=None, prompt=None, output_value="sentence_embedding",
               precision="float32", convert_to_numpy=True, convert_to_tensor=False,
               truncate_dim=None, **_):
        """What does not change a vector (batch_size, device, show_progress_bar) is ignored. Vectors
        always have length 1."""
        if output_value != "sentence_embedding" or precision not in (None, "float32"):
            raise ValueError(f"qemb: not supported (got {output_value}, {precision}; "
                             "want sentence_embedding, float32)")
        one = isinstance(sentences, str)
        texts = [sentences] if one else list(sentences)
        if prompt is not None:  # a prompt is the beginning of the text, also for the tokenizer
            texts, prompt_name = [prompt + text for text in texts], None
        out = self.model.embed(texts, prompt=prompt_name, dim=truncate_dim or self.truncate_dim)
        if convert_to_tensor or not convert_to_numpy:
            import torch
            out = torch.from_numpy(out)
            if not convert_to_tensor and not one:
                return list(out)
        return out[0] if one else out

    def encode_query(self, sentences, **options):
        return self._encode_as("query", sentences, options)

    def encode_document(self, sentences, **options):
        return self._encode_as("document", sentences, options)

    def _encode_as(self, name, sentences, options):
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = name if name in self.prompts else None
        return self.encode(sentences, **options)

    def similarity(self, a, b):
        return unit(a) @ unit(b).T

    def similarity_pairwise(self, a, b):
        return (unit(a) * unit(b)).sum(-1)

    def get_embedding_dimension(self):
        return self.truncate_dim or self.model.dim

    get_sentence_embedding_dimension = get_embedding_dimension
