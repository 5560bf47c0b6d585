// The same elements in row-major order under another number of columns: one invocation per vec4 of the result, padding included.
{# Inside: row < rows and col < width, so the result is written inside. An element is read only where 4 col + k < cols, and then its number is
   less than that of all elements, which x has, too. #}
{% include "shared/group" %}

fn element(row: u32, column: u32) -> {{ number }} {
    if (column >= {{ cols }}u) {
        return {{ number }}();
    }
    let i = row * {{ cols }}u + column;
    return x_at(i / {{ from }}u * x_stride + i % {{ from }}u);
}

@compute @workgroup_size({{ size }})
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
{% include "shared/cell" %}

    let c = 4u * col;
    y_store(row * y_stride + col, vec4<{{ number }}>(element(row, c), element(row, c + 1u), element(row, c + 2u), element(row, c + 3u)));
}
