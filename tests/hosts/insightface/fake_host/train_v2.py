"""What arcface_torch's trainer of that name does, step for step, in fewer lines; for tests without a checkout."""

import argparse
import os

import torch
from backbones import get_model
from dataset import get_dataloader
from losses import CombinedMarginLoss
from lr_scheduler import PolynomialLRWarmup
from partial_fc_v2 import PartialFC_V2
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.utils.data import DataLoader
from utils.utils_callbacks import CallBackVerification, init_logging
from utils.utils_config import get_config

rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
distributed.init_process_group("nccl")


def main(args):
    cfg = get_config(args.config)
    torch.manual_seed(cfg.seed)
    torch.cuda.set_device(local_rank)
    os.makedirs(cfg.output, exist_ok=True)
    log = init_logging(rank, cfg.output)
    loader = get_dataloader(cfg.rec, local_rank, cfg.batch_size, cfg.dali, cfg.dali_aug, cfg.seed, cfg.num_workers)
    backbone = get_model(cfg.network, dropout=0.0, fp16=cfg.fp16, num_features=cfg.embedding_size).cuda()
    backbone = torch.nn.parallel.DistributedDataParallel(
        module=backbone,
        broadcast_buffers=False,
        device_ids=[local_rank],
        bucket_cap_mb=16,
        find_unused_parameters=True,
    )
    if cfg.fp16:  # the host always does; its rounding would hide what the tests compare
        backbone.register_comm_hook(None, fp16_compress_hook)
    backbone.train()
    backbone._set_static_graph()
    margin_loss = CombinedMarginLoss(64, *cfg.margin_list, cfg.interclass_filtering_threshold)
    head = PartialFC_V2(margin_loss, cfg.embedding_size, cfg.num_classes, cfg.sample_rate, False)
    head.train().cuda()
    opt = torch.optim.SGD(
        params=[{"params": backbone.parameters()}, {"params": head.parameters()}],
        lr=cfg.lr,
        momentum=0.9,
        weight_decay=cfg.weight_decay,
    )
    steps = cfg.num_image // (cfg.batch_size * world_size)
    schedule = PolynomialLRWarmup(opt, warmup_iters=steps * cfg.warmup_epoch, total_iters=steps * cfg.num_epoch)
    start_epoch, global_step = 0, 0
    if cfg.resume:
        stored = torch.load(os.path.join(cfg.output, f"checkpoint_gpu_{rank}.pt"))
        start_epoch, global_step = stored["epoch"], stored["global_step"]
        backbone.module.load_state_dict(stored["state_dict_backbone"])
        head.load_state_dict(stored["state_dict_softmax_fc"])
        opt.load_state_dict(stored["state_optimizer"])
        schedule.load_state_dict(stored["state_lr_scheduler"])
    verify = CallBackVerification(cfg.val_targets, cfg.rec)
    for epoch in range(start_epoch, cfg.num_epoch):
        if isinstance(loader, DataLoader):
            loader.sampler.set_epoch(epoch)
        for img, local_labels in loader:
            global_step += 1
            local_embeddings = backbone(img)
            loss = head(local_embeddings, local_labels)
            loss.backward()
            if global_step % cfg.gradient_acc == 0:
                torch.nn.utils.clip_grad_norm_(backbone.parameters(), 5)
                opt.step()
                opt.zero_grad()
            schedule.step()
            log(f"Loss {loss.item():.6f} Global Step: {global_step}")
            if global_step % cfg.verbose == 0:
                verify(global_step, backbone, log)
        if cfg.save_all_states:
            checkpoint = {
                "epoch": epoch + 1,
                "global_step": global_step,
                "state_dict_backbone": backbone.module.state_dict(),
                "state_dict_softmax_fc": head.state_dict(),
                "state_optimizer": opt.state_dict(),
                "state_lr_scheduler": schedule.state_dict(),
            }
            torch.save(checkpoint, os.path.join(cfg.output, f"checkpoint_gpu_{rank}.pt"))
        if rank == 0:
            torch.save(backbone.module.state_dict(), os.path.join(cfg.output, "model.pt"))
    if rank == 0:  # once more, as the host does
        torch.save(backbone.module.state_dict(), os.path.join(cfg.output, "model.pt"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    main(parser.parse_args())
