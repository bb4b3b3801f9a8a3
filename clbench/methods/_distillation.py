"""Distillation in the feature space of a dual encoder: what ZSCL, LwF, LwF-VR and iCaRL for CLIP share.

The student is held to the teacher's similarities between reference images and reference texts. Both similarity
matrices are built with the teacher's text features, so no gradient reaches the student's text tower (zscl card, 6.1).

Shapes: R reference images, N reference texts, D features.
"""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation_losses", "image_image_loss", "similarity", "soft_cross_entropy"]

DIAGONAL = -1e4  # takes the place of an image's similarity to itself


def similarity(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """`scale * cos(image, text)`: (R, D) and (N, D) features, normalised here, -> (R, N). Source: zscl card, 2.2."""
    return scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).mT


def soft_cross_entropy(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """`D(A0, A) = tau^2 mean_rows(-sum_j softmax(A0 / tau)_j log_softmax(A / tau)_j)`: the teacher's logits come first.

    Its least value is tau^2 times the teacher's entropy, not 0. Both (R, N) -> scalar. Source: zscl card, 2.3.
    """
    return temperature**2 * F.cross_entropy(student / temperature, (teacher / temperature).softmax(dim=1))


def distillation_losses(
    student_images: Tensor, teacher_images: Tensor, teacher_texts: Tensor, scale: Tensor | float, temperature: float
) -> tuple[Tensor, Tensor]:
    """`(L_img, L_txt)`: softmax over the N texts, mean over images; and over the R images, mean over texts.

    student_images, teacher_images: (R, D); teacher_texts: (N, D), the teacher's for both. Two scalars.
    Source: zscl card, 2.2 to 2.4.
    """
    student = similarity(student_images, teacher_texts, scale)
    teacher = similarity(teacher_images, teacher_texts, scale)
    return soft_cross_entropy(teacher, student, temperature), soft_cross_entropy(teacher.mT, student.mT, temperature)


def image_image_loss(student: Tensor, teacher: Tensor, scale: Tensor | float, temperature: float) -> Tensor:
    """The same between images and images, an image's similarity to itself replaced by -1e4. Both (R, D) -> scalar.

    Source: vectors of the zscl card (`ablation_image_image`); off in all published runs.
    """
    matrices = [similarity(features, features, scale) for features in (teacher, student)]
    for matrix in matrices:
        matrix.diagonal().fill_(DIAGONAL)
    return soft_cross_entropy(matrices[0], matrices[1], temperature)
