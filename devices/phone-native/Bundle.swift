// Not compiled here. Reads a manifest whose digest TUF has verified, and verifies a file of it by its pieces.
import CryptoKit
import Foundation

let piece: UInt64 = 16 * 1024 * 1024 // bytes

struct Refused: Error { let message: String }

struct Artifact: Decodable {
    let role: String
    let format: String
    let sha256: String
    let size: UInt64
    let pieces: [String]?

    func check() throws {
        let isDigest = sha256.count == 64 && sha256.allSatisfy { "0123456789abcdef".contains($0) }
        guard isDigest else { throw Refused(message: "\(sha256) is no SHA-256") }
        guard size > 0 else { throw Refused(message: "a file of no bytes cannot be") }
        if let pieces, !pieces.isEmpty, UInt64(pieces.count) != (size + piece - 1) / piece {
            throw Refused(message: "\(size) bytes have not \(pieces.count) pieces")
        }
    }
}

struct Bundle: Decodable {
    let kind: String
    let name: String
    let base_sha256: String
    let scale: Float
    let artifacts: [Artifact]

    static func read(_ manifest: Data) throws -> Bundle {
        let bundle = try JSONDecoder().decode(Bundle.self, from: manifest)
        try bundle.artifacts.forEach { try $0.check() }
        return bundle
    }

    /// The one file that runs.
    func runs() throws -> Artifact {
        let isBase = kind == "base"
        let found = artifacts.first { isBase ? $0.sha256 == base_sha256 : ["adapter", "merged"].contains($0.role) }
        guard let found else { throw Refused(message: "\(name) has nothing that runs") }
        return found
    }

    func require(base: Bundle) throws {
        guard base_sha256 == base.base_sha256 else {
            throw Refused(message: "\(name) was made for another base than \(base.name)")
        }
    }
}

/// Returns how many bytes of a partial file are verified; the download goes on from there.
func verified(_ partial: URL, _ artifact: Artifact) throws -> UInt64 {
    let file = try FileHandle(forReadingFrom: partial)
    defer { try? file.close() }
    let available = try file.seekToEnd()
    let pieces = artifact.pieces ?? []
    if pieces.isEmpty {
        let whole = available == artifact.size && (try digest(file, 0, artifact.size)) == artifact.sha256
        return whole ? artifact.size : 0
    }
    for (index, expected) in pieces.enumerated() {
        let from = UInt64(index) * piece
        let length = min(piece, artifact.size - from)
        guard available >= from + length, try digest(file, from, length) == expected else { return from }
    }
    return artifact.size
}

private func digest(_ file: FileHandle, _ from: UInt64, _ length: UInt64) throws -> String {
    try file.seek(toOffset: from)
    var hash = SHA256()
    var left = length
    while left > 0 {
        guard let part = try file.read(upToCount: Int(min(left, 1 << 20))), !part.isEmpty else {
            throw Refused(message: "the file ended early")
        }
        hash.update(data: part)
        left -= UInt64(part.count)
    }
    return hash.finalize().map { String(format: "%02x", $0) }.joined()
}
