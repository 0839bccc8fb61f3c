"""How far blending changes a model's answers, on generated tasks and on a user's own questions.

::

    data     questions: JSONL files, and the file forms that LMCache's rag-qa-quality workload reads
    tasks    generated questions in passages of a chosen size, and the styles of a prompt
    arms     ways to answer the same token ids, by the embedded engine and by a vLLM server
    runner   asks every question in every arm
    results  the file of a run, which another run continues
    scores   differences to the full prefill with intervals, the recommendation, the gate
    report   one HTML page
"""
