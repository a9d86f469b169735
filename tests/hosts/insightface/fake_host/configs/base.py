"""Defaults of the host, with a dict of its own in place of easydict's."""


class Config(dict):
    __setattr__ = dict.__setitem__

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


config = Config(
    margin_list=(1.0, 0.5, 0.0),
    network="r50",
    resume=False,
    save_all_states=False,
    output="base",
    embedding_size=512,
    sample_rate=1,
    interclass_filtering_threshold=0,
    fp16=False,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    weight_decay=5e-4,
    verbose=2000,
    frequent=10,
    dali=False,
    dali_aug=False,
    gradient_acc=1,
    seed=2048,
    num_workers=2,
)
