"""Documents: pieces of long texts, and responses that name the pieces that they rest on (the span protocol's section 7).

    <bos> instruction<seg:1> piece 1<seg:1><seg:2> piece 2<seg:2> ...<solve><seg:m+1><ref:a><ref:b> step ...<eos>

Read from JSONL (`{"document": ..., "steps": [{"text": ..., "sources": [...]}]}`) without code; papers, verdicts and stories are
documents of public repositories.
"""

from data.documents.corpus import Corpus, Document, Example, Step
from data.documents.task import DocumentTask

__all__ = ["Corpus", "Document", "DocumentTask", "Example", "Step"]
