// Not compiled here. Reads a manifest whose digest TUF has verified, and verifies a file of it by its pieces.
package org.example.pitstop

import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.security.MessageDigest
import org.json.JSONObject

const val PIECE = 16 * 1024 * 1024 // bytes

class Refused(message: String) : IOException(message)

class Artifact(json: JSONObject) {
    val role: String = json.getString("role")
    val format: String = json.getString("format")
    val sha256: String = json.getString("sha256")
    val size: Long = json.getLong("size")
    val pieces: List<String> =
        json.optJSONArray("pieces")?.let { all -> List(all.length()) { all.getString(it) } }.orEmpty()

    init {
        if (!Regex("[0-9a-f]{64}").matches(sha256)) throw Refused("$sha256 is no SHA-256")
        if (size < 1) throw Refused("a file of $size bytes cannot be")
        if (pieces.isNotEmpty() && pieces.size.toLong() != (size + PIECE - 1) / PIECE)
            throw Refused("$size bytes have not ${pieces.size} pieces")
    }
}

class Bundle(text: String) {
    private val json = JSONObject(text)
    val name: String = json.getString("name")
    val isBase: Boolean = json.getString("kind") == "base"
    val baseSha256: String = json.getString("base_sha256")
    val scale: Float = json.optDouble("scale", 1.0).toFloat()
    val artifacts: List<Artifact> =
        json.getJSONArray("artifacts").let { all -> List(all.length()) { Artifact(all.getJSONObject(it)) } }
    val runs: Artifact =
        artifacts.first { if (isBase) it.sha256 == baseSha256 else it.role in setOf("adapter", "merged") }

    fun requireBase(base: Bundle) {
        if (baseSha256 != base.baseSha256) throw Refused("$name was made for another base than ${base.name}")
    }
}

/** Returns how many bytes of a partial file are verified; the download goes on from there. */
fun verified(partial: File, artifact: Artifact): Long {
    if (artifact.pieces.isEmpty()) {
        val whole = partial.length() == artifact.size && digest(partial, 0, artifact.size) == artifact.sha256
        return if (whole) artifact.size else 0
    }
    for ((index, expected) in artifact.pieces.withIndex()) {
        val from = index.toLong() * PIECE
        val length = minOf(PIECE.toLong(), artifact.size - from)
        if (partial.length() < from + length || digest(partial, from, length) != expected) return from
    }
    return artifact.size
}

private fun digest(file: File, from: Long, length: Long): String {
    val hash = MessageDigest.getInstance("SHA-256")
    RandomAccessFile(file, "r").use { open ->
        open.seek(from)
        val buffer = ByteArray(1 shl 20)
        var left = length
        while (left > 0) {
            val read = open.read(buffer, 0, minOf(left, buffer.size.toLong()).toInt())
            if (read < 0) throw IOException("${file.name} ended early")
            hash.update(buffer, 0, read)
            left -= read
        }
    }
    return hash.digest().joinToString("") { "%02x".format(it) }
}
