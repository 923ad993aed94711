from models.mdeq import MDEQClsNet
from settings import image_loss


def build():
    model = MDEQClsNet(0.5, 5)
    return model, image_loss(model, classes=1000, side=64)
