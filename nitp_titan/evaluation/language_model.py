"""The harness' view of a model. Imported only to run its tasks: importing the harness takes seconds."""

import logging

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from nitp_titan.errors import UserError
from nitp_titan.evaluation.models import LoadedModel


class _CutPrompts(logging.Filter):
    """Notes that the harness cut a prompt; it would say so for each one."""

    seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        is_cut = "runcat" in record.getMessage()
        self.seen |= is_cut
        return not is_cut and record.levelno >= logging.ERROR


class LanguageModel(HFLM):
    """`HFLM` of a loaded model; whole texts begin with one BOS token, as in training, and have one progress bar.

    The harness begins a whole text with a prefix token, BOS, and then encodes the text, to which most tokenizers give a
    second BOS.

    Raises:
        UserError: if the tokenizer ends prompts with EOS.
    """

    def __init__(self, loaded: LoadedModel):
        if loaded.tokenizer.encode("a")[-1] == loaded.tokenizer.eos_token_id:
            raise UserError(
                f"{loaded.source}: its tokenizer ends every text with {loaded.tokenizer.eos_token}, prompts too; take "
                "the token out of tokenizer.json's post_processor, or set add_eos_token in tokenizer_config.json to "
                "false."
            )
        super().__init__(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=loaded.batch_size)
        self._windows: tqdm | None = None
        self.cut = _CutPrompts()
        log = logging.getLogger(HFLM.__module__)
        log.setLevel(logging.WARNING)
        log.filters = [self.cut]

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        if self._windows is not None:
            add_special_tokens = False
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        with tqdm(desc="windows of text", unit=" windows", mininterval=1.0) as self._windows:
            found = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._windows = None
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        if self._windows is not None:
            self._windows.update(len(requests))
        return super()._loglikelihood_tokens(requests, disable_tqdm or self._windows is not None, override_bs)
