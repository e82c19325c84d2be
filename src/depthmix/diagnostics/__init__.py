"""What a network does in depth: the paper's figures and more, from any checkpoint.

``capture.py`` gives activations by name, ``subject.py`` says what is needed of a model (``huggingface.py``: of one
of transformers, ``adapted.py``: of one that :func:`depthmix.adapt` made; ``opening.py`` reads either),
``measures.py`` has the statistics of one pass over the texts, ``passes.py`` what takes passes of its own, ``run.py``
puts them together into the :class:`~depthmix.diagnostics.arrays.Diagnosis` that reports are drawn from.

Axes of the arrays, all from 0, for L blocks and n streams:

``block``           0 .. L - 1
``sublayer``        2i is the attention of block i, 2i + 1 its MLP
``from``, ``to``, ``depth``   0 .. L: depth i is what enters block i, depth L what leaves the last
``stream``          0 .. n - 1, in the order in which they came to be
``representation``  0 is the hidden state, 1 + i stream i
``source``          a stream or an earlier output that a pool reads; of the mixing map 0 is the embedding, 1 + s the
                    output of sublayer s
``reader``          of the mixing map: the input of sublayer s, and last the trunk's output
``rank``            0 .. 2: largest, second, third
``bin``, ``edge``, ``quantile``   of a histogram; quantiles are 5, 25, 50, 75, 95 %
"""

PARTS = {
    "activations": "magnitudes, distances, gates, pools, streams: one pass over all texts",
    "gradients": "root mean square gradient of every block",
    "removal": "change of the loss when a block writes nothing",
    "mixing": "how much of every earlier output each sublayer reads",
    "reconstruction": "error of streams reconstructed by inverting the gates",
}
"""What a diagnosis is made of."""
