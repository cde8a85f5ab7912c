"""DMD2 on the tiny Qwen-Image in the plainest way: one sample at a time, straight from the formulas of the paper."""

import math

import torch
from torch.nn import functional


class PlainDMD2:
    """The losses of one sample.

    Args:
        student, teacher, fake_score: Denoisers of diffusers.
        discriminator: State dict of the heads: conv, norm, conv in each.
        sigmas: Levels of the student's steps, and 0.
        low, high: Range of the matching level, which falls with u; ``logit`` (mean, deviation) or None for uniform.
        layers: Blocks that the discriminator sees.
        guidance: Scale of the teacher, and the empty caption.
    """

    def __init__(
        self, student, teacher, fake_score, discriminator, *, sigmas, low=0.001, high=0.999, logit=None, layers=(1,),
        gan=0.03, r1=0.0, alpha=0.1, logit_reg=0.0, guidance=None, empty=None,
    ):  # fmt: skip
        self.student, self.teacher, self.fake_score, self.discriminator = student, teacher, fake_score, discriminator
        self.sigmas, self.low, self.high, self.logit, self.layers = sigmas, low, high, logit, layers
        self.gan, self.r1, self.alpha, self.logit_reg = gan, r1, alpha, logit_reg
        self.guidance, self.empty = guidance, empty

    def x0(self, dit, x, text, sigma):
        """Return x - σ·v, and what the layers put out at the image's tokens as maps."""
        from diffusers import QwenImagePipeline

        _, channels, _, height, width = x.shape
        maps, hooks = [], []
        for layer in self.layers:
            keep = lambda _, __, output: maps.append(  # noqa: E731
                output[1].permute(0, 2, 1).reshape(1, -1, height // 2, width // 2)
            )
            hooks.append(dit.transformer_blocks[layer].register_forward_hook(keep))
        velocity = dit(
            hidden_states=QwenImagePipeline._pack_latents(x, 1, channels, height, width),
            encoder_hidden_states=text,
            timestep=torch.tensor([sigma], dtype=torch.float32),
            img_shapes=[[(1, height // 2, width // 2)]],
            return_dict=False,
        )[0]
        for hook in hooks:
            hook.remove()
        velocity = QwenImagePipeline._unpack_latents(velocity, height * 8, width * 8, 8)
        return x - sigma * velocity, maps

    def logits(self, maps):
        weights = self.discriminator
        logits = []
        for number, features in enumerate(maps):
            first, norm, last = (
                (weights[f"heads.{number}.{place}.weight"], weights[f"heads.{number}.{place}.bias"])
                for place in (0, 1, 3)
            )
            channels = len(first[1])
            x = functional.conv2d(features, *first, stride=2, padding=1)
            x = functional.group_norm(x, channels // 4 if channels <= 32 else 32, *norm)
            x = functional.conv2d(functional.leaky_relu(x, 0.2), *last)
            logits.append(x.mean())
        return torch.stack(logits)

    def matching_sigma(self, u):
        if self.logit is None:
            return self.high - u * (self.high - self.low)
        mean, std = self.logit
        z = -math.sqrt(2) * float(torch.special.erfinv(torch.tensor(2 * u - 1, dtype=torch.float64)))
        return self.low + (self.high - self.low) / (1 + math.exp(-(mean + std * z)))

    def generate(self, real, text, draws):
        step = int(draws["step"] * (len(self.sigmas) - 1))
        sigma = self.sigmas[step]
        start = sigma * draws["student"] + ((1 - sigma) * real if len(self.sigmas) > 2 else 0)
        return self.x0(self.student, start, text, sigma)[0]

    def student_loss(self, real, text, draws):
        x = self.generate(real, text, draws)
        sigma = self.matching_sigma(draws["u"])
        noisy = (1 - sigma) * x + sigma * draws["matching"]
        with torch.no_grad():
            fake, _ = self.x0(self.fake_score, noisy, text, sigma)
            teacher, _ = self.x0(self.teacher, noisy, text, sigma)
            if self.guidance is not None:
                without, _ = self.x0(self.teacher, noisy, self.empty, sigma)
                teacher = without + self.guidance * (teacher - without)
            gradient = (fake - teacher) / ((x - teacher).abs().mean() + 1e-6)
        # the value of ½·mean(g²), the gradient of mean(x·g)
        loss = (x * gradient).mean() + (0.5 * gradient.square() - x.detach() * gradient).mean()
        if self.gan:
            logits = self.logits(self.x0(self.teacher, noisy, text, sigma)[1])
            loss = loss + self.gan * torch.log1p(torch.exp(-logits)).mean()
        return loss

    def critic_loss(self, real, text, draws):
        with torch.no_grad():
            x = self.generate(real, text, draws)
            sigma = self.matching_sigma(draws["u"])
            noisy, noisy_real = ((1 - sigma) * clean + sigma * draws["matching"] for clean in (x, real))
            near_real = real + self.alpha * draws["r1"]
            seen = [self.x0(self.teacher, latents, text, sigma)[1] for latents in (noisy, noisy_real, near_real)]
        fake, _ = self.x0(self.fake_score, noisy, text, sigma)
        loss = functional.mse_loss(fake, x)
        if self.gan:
            fake_logits, real_logits, near_logits = map(self.logits, seen)
            loss = loss + torch.log1p(torch.exp(fake_logits)).mean() + torch.log1p(torch.exp(-real_logits)).mean()
            loss = loss + self.logit_reg * (real_logits.square().mean() + fake_logits.square().mean()) / 2
            loss = loss + self.r1 * functional.mse_loss(real_logits, near_logits)
        return loss
